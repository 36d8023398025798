"""Vision towers: measured with the decoder, pruned and refit block by block like it."""
