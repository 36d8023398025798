"""Logs as SAPIEN 2.2.2 does, to stderr. VK_ICD_FILENAMES=nowhere: no driver, which that version only logs."""

import os
import sys

ERROR = """\
[2026-01-01 00:00:00.000] [svulkan2] [error] Vulkan is incompatible with your driver. You may not use the renderer to \
render, however, CPU resources will be still available.
[2026-01-01 00:00:00.000] [svulkan2] [info] Vulkan finished
"""
FOUND = """\
[2026-01-01 00:00:00.000] [svulkan2] [info] Vulkan instance initialized
[2026-01-01 00:00:00.000] [svulkan2] [info] Devices visible to Vulkan
 Id                                    name   Present Supported    PciBus    CudaId     RayTracing
  0        llvmpipe (LLVM 15.0.6, 256 bits)         0         1         0 No Device              1
  1                      A GPU of that name         0         1        65         0              1

[2026-01-01 00:00:00.000] [svulkan2] [info] Devices visible to Cuda
    CudaId    PciBus             PciBusString
         0        65              00000000:65
[2026-01-01 00:00:00.000] [svulkan2] [info] Vulkan picked device: 1
[2026-01-01 00:00:00.000] [svulkan2] [info] Vulkan finished
"""


class SapienRenderer:
    level = "warn"

    @classmethod
    def set_log_level(cls, level: str) -> None:
        cls.level = level

    def __init__(self) -> None:
        if os.environ.get("VK_ICD_FILENAMES") == "nowhere":
            print(ERROR, file=sys.stderr)
        elif self.level == "info":
            print(FOUND, file=sys.stderr)
