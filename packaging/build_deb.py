"""Builds the Debian package: `packaging/build-deb [DIRECTORY]`.

In it is mirrorfs with an environment of its own below /usr/lib/mirrorfs: the libraries that it needs, as `.venv` has them,
which are those of requirements.lock. So nothing is downloaded or compiled here, and nothing of the system's Python is touched.
"""

import compileall
import gzip
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Final

import completions
import man_pages
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_PROJECT: Final = Path(__file__).resolve().parents[1]
_HOME: Final = Path("usr/lib/mirrorfs")
_PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
_NEXT_PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor + 1}"


def main() -> None:
    """Build it into the directory that is given, the present one by default, and print its path."""
    if sys.base_prefix != "/usr":
        sys.exit(
            f"build-deb: .venv is of the Python in {sys.base_prefix}, the package needs Debian's: remove .venv and begin again"
        )
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    version = metadata.version("mirrorfs")
    architecture = subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="mirrorfs-deb-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        _environment(root)
        _programs(root)
        _documents(root)
        _manual(root)
        completions.write(root)
        _control(root, version, architecture)
        file = target / f"mirrorfs_{version}_{architecture}.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, file], check=True, stdout=subprocess.DEVNULL)
    print(file)


def _needed(name: str, found: dict[str, metadata.Distribution]) -> None:
    """The distributions that one needs, and those that they need."""
    distribution = metadata.distribution(name)
    for line in distribution.requires or ():
        requirement = Requirement(line)
        key = canonicalize_name(requirement.name)
        if key not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[key] = metadata.distribution(key)
            _needed(key, found)


def _environment(root: Path) -> None:
    """A virtual environment as `python -m venv` makes one, for where it will be."""
    home = root / _HOME
    site = home / "lib" / _PYTHON / "site-packages"
    site.mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "bin" / "python3").symlink_to(f"/usr/bin/{_PYTHON}")
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {sys.version.split()[0]}\n"
    )
    installed = Path(sysconfig.get_path("purelib"))
    found: dict[str, metadata.Distribution] = {}
    _needed("mirrorfs", found)
    for distribution in found.values():
        for file in distribution.files or ():
            source = Path(str(file.locate())).resolve()
            if source.is_relative_to(installed) and "__pycache__" not in source.parts:
                place = site / source.relative_to(installed)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, place)
    shutil.copytree(_PROJECT / "src" / "mirrorfs", site / "mirrorfs", ignore=shutil.ignore_patterns("__pycache__"))
    own = metadata.distribution("mirrorfs")
    about = site / f"mirrorfs-{own.version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mirrorfs\nVersion: {own.version}\n")
    compileall.compile_dir(site, quiet=1, stripdir=root, prependdir="/", workers=0)


def _programs(root: Path) -> None:
    for directory in ("usr/bin", "usr/sbin", "usr/lib/systemd/system"):
        (root / directory).mkdir(parents=True)
    program = root / "usr" / "bin" / "mirrorfs"
    program.write_text(f'#!/bin/sh\nexec /{_HOME}/bin/python3 -I -m mirrorfs "$@"\n')
    program.chmod(0o755)
    shutil.copy(_PROJECT / "packaging" / "mount.fuse.mirrorfs", root / "usr" / "sbin")
    for unit in (_PROJECT / "packaging" / "systemd").iterdir():
        shutil.copy(unit, root / "usr" / "lib" / "systemd" / "system")
    # Pacemaker finds it there as ocf:mirrorfs:volume.
    agents = root / "usr" / "lib" / "ocf" / "resource.d" / "mirrorfs"
    agents.mkdir(parents=True)
    shutil.copy(_PROJECT / "packaging" / "ocf" / "volume", agents)


def _documents(root: Path) -> None:
    documents = root / "usr" / "share" / "doc" / "mirrorfs"
    documents.mkdir(parents=True)
    shutil.copy(_PROJECT / "README.md", documents)
    shutil.copytree(_PROJECT / "docs", documents / "docs")
    shutil.copytree(_PROJECT / "examples", documents / "examples")
    shutil.copytree(_PROJECT / "packaging" / "monitoring", documents / "monitoring")
    shutil.copytree(_PROJECT / "packaging" / "ansible", documents / "ansible")
    (documents / "copyright").write_text(
        "mirrorfs is under the Apache License, Version 2.0: /usr/share/common-licenses/Apache-2.0\n\n"
        f"The libraries below /{_HOME} have licenses of their own, which stand in their *.dist-info directories there.\n"
    )


def _manual(root: Path) -> None:
    for page in man_pages.write(root / "usr" / "share" / "man"):
        # Without a name and a time in it: the same page is the same file.
        page.with_name(f"{page.name}.gz").write_bytes(gzip.compress(page.read_bytes(), mtime=0))
        page.unlink()


def _control(root: Path, version: str, architecture: str) -> None:
    size = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file()) // 1024
    control = root / "DEBIAN"
    control.mkdir()
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    (control / "control").write_text(
        textwrap.dedent(f"""\
        Package: mirrorfs
        Version: {version}
        Architecture: {architecture}
        Maintainer: The mirrorfs developers <mirrorfs@localhost>
        Section: admin
        Priority: optional
        Installed-Size: {size}
        Depends: python3 (>= {minor}), python3 (<< {_NEXT_PYTHON}), libfuse3-3, util-linux
        Recommends: chrony | systemd-timesyncd | time-daemon
        Suggests: pacemaker, resource-agents
        Description: file system mirrored between two plain Linux servers
         An unchanged application writes below a directory; every write is on a second server
         when it returns. When the first server dies, the second carries on, with all that was
         acknowledged, at the same address.
        """)
    )
    scripts = {
        "postinst": "mkdir -p -m 0755 /etc/mirrorfs\n[ -d /run/systemd/system ] && systemctl daemon-reload || true\n",
        "prerm": (
            'if [ "$1" = remove ] && grep -q "fuse[.]mirrorfs" /proc/self/mounts; then\n'
            '    echo "mirrorfs: a volume is mounted here, unmount it first: mirrorfs unmount" >&2\n'
            "    exit 1\nfi\n"
        ),
        "postrm": (
            "[ -d /run/systemd/system ] && systemctl daemon-reload || true\n"
            "rmdir --ignore-fail-on-non-empty /etc/mirrorfs 2>/dev/null || true\n"
        ),
    }
    for name, text in scripts.items():
        script = control / name
        script.write_text(f"#!/bin/sh\nset -e\n{text}")
        script.chmod(0o755)


if __name__ == "__main__":
    main()
