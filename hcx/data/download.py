"""Fetches packages with their registries' own programs, and unpacks them without running anything inside.

pip, apt-get and npm are asked for files, never to install: pip takes wheels only (building a source archive would run
its code), npm ignores scripts. Archives are unpacked here, regular files only. What is there is not fetched again: each
package is moved into place when it is whole, so an interrupted fetch goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from hcx.artifacts import digest_file
from hcx.data.packages import Package
from hcx.errors import DataError
from hcx.obs import Progress

_TIMEOUT_S = 900
_MAX_UNPACKED_BYTES = 4 << 30
"""Of one package; the largest that hcx reads has about 0.5 GB."""
_UNPACKED = "unpacked"

Run = Callable[[list[str], Path], None]


@dataclass(frozen=True)
class Fetched:
    """A package on this machine.

    Attributes:
        package: what was asked for.
        file: the archive.
        sha256: of the archive.
        folder: what was in it.
    """

    package: Package
    file: Path
    sha256: str
    folder: Path


def run_program(command: list[str], folder: Path) -> None:
    """Runs a registry's program in a folder.

    Raises:
        DataError: it is not installed, or failed; with its last words.
    """
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not installed; {_ELSEWHERE}") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"{' '.join(command)}: no answer within {_TIMEOUT_S} s; {_ELSEWHERE}") from None
    except subprocess.CalledProcessError as error:
        said = [line for line in (error.stderr or "").splitlines() if line.strip()]
        raise DataError(
            f"{' '.join(command)}: {said[-1].strip() if said else f'exit code {error.returncode}'}\n"
            f"  the registry may be out of reach; try again, or {_ELSEWHERE}"
        ) from None


_ELSEWHERE = "unpack the package into a directory yourself and name it with --from DIR"


def commands(package: Package) -> list[list[str]]:
    """What fetches a package into the working directory; a later command is tried when an earlier one failed."""
    if package.registry == "PyPI":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        version = ["--python-version", package.python] if package.python else []
        return [[*pip, "--no-deps", "--only-binary=:all:", *version, package.requirement]]
    if package.registry == "npm":
        return [["npm", "pack", "--silent", "--ignore-scripts", package.requirement]]
    return [["apt-get", "download", "-qq", package.requirement]]


def fetch_packages(packages: Iterable[Package], cache: Path, run: Run = run_program) -> list[Fetched]:
    """Fetches and unpacks packages that are not in the cache yet.

    Args:
        packages: what to fetch.
        cache: archives go to `REGISTRY/NAME`, their contents to `unpacked/NAME`.
        run: runs a command in a folder.

    Raises:
        DataError: a registry cannot be reached, a file is not the pinned one, or an archive is damaged or unsafe.
    """
    wanted = list(dict.fromkeys(packages))
    fetched = []
    with Progress("fetching", len(wanted), "packages") as progress:
        for package in wanted:
            fetched.append(_fetch(package, cache, run))
            progress.advance()
    return fetched


def unpacked_folder(cache: Path) -> Path:
    """Where the contents of all packages of a cache lie."""
    return cache / _UNPACKED


def _fetch(package: Package, cache: Path, run: Run) -> Fetched:
    shelf = cache / package.registry / package.name
    if not shelf.is_dir():
        partial = shelf.with_name(f".{package.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _download(package, partial, run)
            _check(package, _archive(package, partial))
            os.replace(partial, shelf)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    file = _archive(package, shelf)
    sha256 = _check(package, file)
    folder = cache / _UNPACKED / package.name
    if not folder.is_dir():
        partial = folder.with_name(f".{package.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            unpack(file, partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Fetched(package, file, sha256, folder)


def _download(package: Package, folder: Path, run: Run) -> None:
    try:
        for command in commands(package):
            run(command, folder)
    except DataError:
        if package.registry != "Debian":
            raise
        # The list of packages may be older than the package: it names a version that is gone.
        run(["apt-get", "update", "-qq"], folder)
        for command in commands(package):
            run(command, folder)


def _archive(package: Package, folder: Path) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".whl", ".deb", ".tgz"))
    if len(files) != 1:
        raise DataError(f"{folder}: {len(files)} archives of {package.requirement}, expected one; remove the folder")
    return files[0]


def _check(package: Package, file: Path) -> str:
    sha256 = digest_file(file).removeprefix("sha256:")
    if package.sha256 is not None and not sha256.startswith(package.sha256):
        raise DataError(
            f"{file.name}: sha256 {sha256}, expected {package.sha256}...: not the file that this version of hcx "
            f"knows; remove {file.parent} and fetch again"
        )
    return sha256


def unpack(file: Path, folder: Path) -> None:
    """Unpacks the regular files of a wheel, a Debian package or an npm package; links and devices are left out.

    Raises:
        DataError: a damaged archive, a name that leads out of the folder, or more than 4 GB.
    """
    total = 0
    try:
        for name, size, open_member in _members(file):
            total += size
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise DataError(f"{file}: holds {name!r}, which leads out of the folder; not unpacked")
            if total > _MAX_UNPACKED_BYTES:
                raise DataError(f"{file}: more than {_MAX_UNPACKED_BYTES >> 30} GB unpacked; not unpacked")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_member() as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{file}: damaged archive: {error}; remove {file.parent} and fetch again") from None


def _members(file: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                # The upper half of the attributes is a Unix mode; 0o120000 is a link.
                if not info.is_dir() and (info.external_attr >> 16) & 0o170000 != 0o120000:
                    yield info.filename, info.file_size, lambda info=info: archive.open(info)  # type: ignore[misc]
        return
    if file.suffix == ".tgz":
        with tarfile.open(file, "r:gz") as tar:
            yield from _tar_members(tar)
        return
    try:
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise DataError(f"dpkg-deb is not installed; {_ELSEWHERE}") from None
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as tar:
        yield from _tar_members(tar)
    if process.returncode:
        raise DataError(f"{file}: dpkg-deb cannot unpack it (exit code {process.returncode})")


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    for member in tar:
        if member.isfile():
            yield member.name, member.size, lambda member=member: tar.extractfile(member)  # type: ignore[misc]
