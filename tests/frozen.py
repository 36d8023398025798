"""Imported after everything large: the collector leaves that alone, so that forked processes go on sharing it."""

import gc

gc.freeze()
gc.enable()
