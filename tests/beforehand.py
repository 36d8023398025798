"""Imported before anything large, by the tests and by the server that processes are forked from; frozen.py ends it."""

import gc
import os

gc.disable()  # what is imported is no garbage: looking through it again and again takes a fifth of the time

# Where a test asks for more threads than there are idle cores, those that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which always spin
