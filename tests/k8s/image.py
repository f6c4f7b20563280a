#!/usr/bin/env python3
"""Packs a directory as a container image of one layer that `ctr image import` takes.

  image.py OUT.tar NAME[,NAME...] DIRECTORY CONFIG      CONFIG: JSON with Entrypoint, Cmd, User
"""
import hashlib
import io
import json
import sys
import tarfile


def of_root(entry):
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = 'root'
    entry.mtime = 0
    return entry


def add(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def main():
    out, names, directory, config = sys.argv[1:]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w', format=tarfile.PAX_FORMAT) as tar:
        tar.add(directory, arcname='.', filter=of_root)
    layer = packed.getvalue()
    digest = hashlib.sha256(layer).hexdigest()
    path = 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
    description = json.dumps({
        'architecture': 'amd64',
        'os': 'linux',
        'created': '2000-01-01T00:00:00Z',
        'config': {'Env': [path], **json.loads(config)},
        'rootfs': {'type': 'layers', 'diff_ids': [f'sha256:{digest}']},
        'history': [{'created': '2000-01-01T00:00:00Z', 'created_by': 'image.py'}],
    }).encode()
    described = hashlib.sha256(description).hexdigest()
    manifest = [{
        'Config': f'{described}.json',
        'RepoTags': names.split(','),
        'Layers': [f'{digest}/layer.tar'],
    }]
    with tarfile.open(out, 'w') as tar:
        add(tar, f'{described}.json', description)
        add(tar, f'{digest}/layer.tar', layer)
        add(tar, 'manifest.json', json.dumps(manifest).encode())


if __name__ == '__main__':
    main()
