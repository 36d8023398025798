"""Print which libraries Python finds, and end with 1 unless they are those that a constraints file pins."""

import argparse
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("constraints", type=Path)
    path = parser.parse_args().constraints
    pins = read_pins(path)
    found = {name: installed_version(name) for name in pins}
    spec = importlib.util.find_spec("transformers")
    print(f"{path.name}: {', '.join(f'{name} {number}' for name, number in found.items())}")
    print(f"transformers stands in {Path(spec.origin).parent if spec and spec.origin else 'no file'}")
    if found != pins:
        sys.exit(f"Not what {path} pins; run make clean.")


def installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def read_pins(path: Path) -> dict[str, str]:
    """Name -> version of every `name==version` line."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE))


if __name__ == "__main__":
    main()
