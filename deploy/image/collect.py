#!/usr/bin/env python3
"""Collects what a container of Sheave runs, and nothing else, from a Debian system.

  collect.py ROOT SHEAVE OUT      ROOT: a Debian system, / or unpacked packages; SHEAVE: the program
"""

import shutil
import subprocess
import sys
from pathlib import Path

# By package. The node engine runs those of the file systems; the daemon runs partx, and modprobe
# where it may load drivers.
PROGRAMS = {
    'e2fsprogs': ['mkfs.ext4', 'e2fsck', 'resize2fs'],
    'xfsprogs': ['mkfs.xfs', 'xfs_repair', 'xfs_growfs'],
    'btrfs-progs': ['mkfs.btrfs', 'btrfs'],
    'util-linux': ['partx'],
    'kmod': ['modprobe'],
}
FILES = ['etc/mke2fs.conf', 'usr/share/xfsprogs']
DIRECTORIES = ['dev', 'etc/sheave', 'proc', 'run/sheave', 'sys', 'tmp', 'var/lib/sheave']
PROGRAM_DIRECTORIES = ['usr/sbin', 'sbin', 'usr/bin', 'bin']

def die(why):
    sys.exit(f'collect.py: {why}')

def find(root, name):
    for directory in PROGRAM_DIRECTORIES:
        path = root / directory / name
        if path.exists():
            return path
    die(f'{root}: no {name} in it')

def libraries(root, program):
    """Of a program, and the loader: their paths in the system."""
    loader = root / 'lib64/ld-linux-x86-64.so.2'
    if not loader.exists():
        die(f'{loader} is not there; only amd64 is supported')
    places = [root / 'lib/x86_64-linux-gnu', root / 'usr/lib/x86_64-linux-gnu']
    path = ':'.join(str(place) for place in places)
    listed = subprocess.run([loader, '--library-path', path, '--list', program],
                            capture_output=True, text=True, check=False)
    if listed.returncode:
        die(f'{program}: {listed.stderr.strip()}')
    for line in listed.stdout.splitlines():
        name, _, rest = line.strip().partition(' => ')
        if rest:
            yield name, Path(rest.split(' ')[0])
    yield loader.name, loader

def copy(source, target):
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        shutil.copymode(source, target)

def add_program(root, name, out):
    source = find(root, name)
    real = source.resolve()
    target = out / 'usr/sbin' / real.name
    copy(real, target)
    if name != real.name:
        (out / 'usr/sbin' / name).symlink_to(real.name)
    add_libraries(root, real, out)

def add_libraries(root, program, out):
    for name, library in libraries(root, program):
        where = 'usr/lib64' if name.startswith('ld-linux') else 'usr/lib/x86_64-linux-gnu'
        copy(library.resolve(), out / where / name)

def owners(root):
    """Which package a file of the system is from, by the name of the file."""
    found = {}
    for listing in sorted((root / 'var/lib/dpkg/info').glob('*.list')):
        package = listing.stem.split(':')[0]
        for path in listing.read_text().splitlines():
            found.setdefault(Path(path).name, package)
    return found

def add_licences(root, out):
    by_name = owners(root)
    packages = {by_name[file.name] for file in out.glob('usr/**/*')
                if file.is_file() and file.name in by_name}
    for package in sorted(packages):
        copyright_file = root / 'usr/share/doc' / package / 'copyright'
        if copyright_file.exists():
            copy(copyright_file.resolve(), out / 'usr/share/doc' / package / 'copyright')

def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    root, sheave, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    if not sheave.is_file():
        die(f'there is no program {sheave}; run: make build, or set SHEAVE_BIN')
    for directory in ['usr/bin', 'usr/sbin', 'usr/lib', 'usr/lib64', *DIRECTORIES]:
        (out / directory).mkdir(parents=True)
    for directory in ['bin', 'sbin', 'lib', 'lib64']:
        (out / directory).symlink_to(f'usr/{directory}')
    (out / 'tmp').chmod(0o1777)
    program = out / 'usr/bin/sheave'
    subprocess.run(['strip', '-o', program, sheave], check=True)
    program.chmod(0o755)
    add_libraries(root, program, out)
    for names in PROGRAMS.values():
        for name in names:
            add_program(root, name, out)
    for name in FILES:
        source = root / name
        for file in [source] if source.is_file() else sorted(source.rglob('*')):
            if file.is_file():
                copy(file, out / file.relative_to(root))
    add_licences(root, out)

if __name__ == '__main__':
    main()
