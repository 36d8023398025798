"""A Vulkan driver for machines without a GPU: lavapipe of Mesa 25, unpacked into the environment's folder.

Debian's packages, through apt with an index of its own: no root, and the machine's packages stay as they are.
"""

import json
import shutil
import subprocess
from pathlib import Path

from environments.building import Environment, Failed, Missing, run

_ELSEWHERE = "elsewhere set VK_ICD_FILENAMES to the driver file of a GPU, or of lavapipe of Mesa 25 or newer"
_SUITES = {"bookworm": ("bookworm", "bookworm-backports"), "trixie": ("trixie",)}  # where Mesa 25 is
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# SAPIEN 2.2.2 asks for an extension that lavapipe lacks and only CUDA needs: another one's name is put in its place.
_ASKED, _INSTEAD = b"VK_KHR_external_semaphore_fd\0", b"VK_KHR_external_memory_fd\0"


def lavapipe(environment: Environment) -> dict[str, str]:
    """Variables with which programs of the environment find it. Errors: not on Debian; its packages are not reached."""
    mesa = environment.folder / "mesa"
    libraries = mesa / "usr" / "lib" / "x86_64-linux-gnu"
    driver = environment.folder / "lavapipe.json"
    if not driver.exists():
        shutil.rmtree(mesa, ignore_errors=True)
        _unpack(environment, mesa)
        (described,) = (mesa / "usr" / "share" / "vulkan" / "icd.d").glob("lvp_icd*.json")
        record = json.loads(described.read_text())
        record["ICD"]["library_path"] = str(libraries / "libvulkan_lvp.so")
        driver.write_text(json.dumps(record))
    _spare_extension(environment)
    return {"VK_ICD_FILENAMES": str(driver), "LD_LIBRARY_PATH": str(libraries)}


def _unpack(environment: Environment, mesa: Path) -> None:
    """Mesa's packages, and those they need that this machine lacks or has too old."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Missing(f"a Vulkan driver; on Debian this script unpacks one with apt-get, {_ELSEWHERE}")
    apt = environment.folder / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    site, release = _own_mirror()
    lines = [f"deb [signed-by={_KEYRING}] {site} {suite} main\n" for suite in _SUITES[release]]
    (apt / "sources.list").write_text("".join(lines))
    settings = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "Debug::NoLocking": 1,
        "APT::Sandbox::User": "",
    }
    command = ["apt-get", "--quiet", *(f"--option={name}={value}" for name, value in settings.items())]
    run([*command, "update"], environment.log, "apt-get update failed")
    packages = ["--target-release", _SUITES[release][-1], "mesa-vulkan-drivers", "libvulkan1"]
    # --reinstall: what the machine has of Mesa itself is unpacked, too.
    download = [*command, "install", "--yes", "--no-install-recommends", "--download-only", "--reinstall", *packages]
    run(download, environment.log, "apt-get cannot get Mesa")
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run(["dpkg-deb", "--extract", package, mesa], environment.log, f"{package.name} cannot be unpacked")
    shutil.rmtree(apt)


def _own_mirror() -> tuple[str, str]:
    """Address and release of the Debian that this machine's apt is set up with."""
    wanted = ["--format", "$(SITE) $(RELEASE)", "Created-By: Packages", "Component: main"]
    listed = subprocess.run(["apt-get", "indextargets", *wanted], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        site, release = line.split()
        if release in _SUITES and _KEYRING.exists():
            return site, release
    raise Missing(f"a Vulkan driver; on Debian 12 and 13 this script unpacks one, {_ELSEWHERE}")


def _spare_extension(environment: Environment) -> None:
    code = "import importlib.util as u; print(u.find_spec('sapien').submodule_search_locations[0])"
    package = environment.run([environment.python, "-c", code], "SAPIEN is not installed").split("\n")[0]
    for library in Path(package).parent.glob("sapien.libs/libsapien*.so"):
        content = library.read_bytes()
        if _ASKED in content:
            library.write_bytes(content.replace(_ASKED, _INSTEAD.ljust(len(_ASKED), b"\0")))
        elif _INSTEAD not in content:
            raise Failed(f"{library} does not name the Vulkan extension that was expected; is it SAPIEN 2.2.2?")
