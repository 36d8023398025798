"""A stand-in for SIMPLER's video writer, which is only looked for."""
