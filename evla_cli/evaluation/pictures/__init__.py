"""The pictures of `evla report`. Each is one file: its numbers, its tables, a sentence, and how it is drawn."""
