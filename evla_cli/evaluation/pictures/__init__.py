"""The pictures of `evla report`. Each is one file: what it says in numbers, in a table, in a sentence, how it is drawn."""
