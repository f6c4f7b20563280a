#!/usr/bin/env python3
"""Packs a directory as a container image of one layer: an archive of the Open Container Initiative
that `ctr images import`, `podman load`, `skopeo` and `docker load` take. The same input makes the
same bytes.

  pack.py OUT.tar NAME[,NAME...] DIRECTORY CONFIG

CONFIG is JSON with Entrypoint, Cmd, User, Labels.
"""
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile

OCI = 'application/vnd.oci.image'
MADE = '2000-01-01T00:00:00Z'


def of_root(entry):
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ''
    entry.mtime = 0
    # Whatever the umask was.
    entry.mode |= 0o755 if entry.mode & 0o100 or entry.isdir() else 0o644
    entry.mode &= ~0o022 if entry.mode & 0o1000 == 0 else ~0
    return entry


def layer_of(directory):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w', format=tarfile.GNU_FORMAT) as tar:
        for place, directories, files in os.walk(directory):
            directories.sort()
            links = [name for name in directories if os.path.islink(os.path.join(place, name))]
            if place != directory:
                tar.add(place, os.path.relpath(place, directory), recursive=False, filter=of_root)
            for name in sorted(files + links):
                path = os.path.join(place, name)
                tar.add(path, os.path.relpath(path, directory), recursive=False, filter=of_root)
    return packed.getvalue()


def add(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def descriptor(kind, content):
    digest = f'sha256:{hashlib.sha256(content).hexdigest()}'
    return {'mediaType': f'{OCI}.{kind}', 'digest': digest, 'size': len(content)}


def main():
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    out, names, directory, config = sys.argv[1:]
    names = names.split(',')
    layer = layer_of(directory)
    packed = gzip.compress(layer, 9, mtime=0)
    path = 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
    described = json.dumps({
        'architecture': 'amd64',
        'os': 'linux',
        'created': MADE,
        'config': {'Env': [path], **json.loads(config)},
        'rootfs': {'type': 'layers', 'diff_ids': [f'sha256:{hashlib.sha256(layer).hexdigest()}']},
        'history': [{'created': MADE, 'created_by': 'pack.py'}],
    }).encode()
    of_config = descriptor('config.v1+json', described)
    of_layer = descriptor('layer.v1.tar+gzip', packed)
    manifest = json.dumps({
        'schemaVersion': 2,
        'mediaType': f'{OCI}.manifest.v1+json',
        'config': of_config,
        'layers': [of_layer],
    }).encode()
    of_manifest = descriptor('manifest.v1+json', manifest)
    named = [{**of_manifest, 'annotations': {
        'io.containerd.image.name': name,
        'org.opencontainers.image.ref.name': name.rpartition(':')[2],
    }} for name in names]
    index = {'schemaVersion': 2, 'mediaType': f'{OCI}.index.v1+json', 'manifests': named}
    blob = lambda of: f"blobs/sha256/{of['digest'].partition(':')[2]}"
    with tarfile.open(out, 'w', format=tarfile.GNU_FORMAT) as tar:
        add(tar, 'oci-layout', json.dumps({'imageLayoutVersion': '1.0.0'}).encode())
        add(tar, 'index.json', json.dumps(index).encode())
        # For docker load.
        listed = [{'Config': blob(of_config), 'RepoTags': names, 'Layers': [blob(of_layer)]}]
        add(tar, 'manifest.json', json.dumps(listed).encode())
        for of, content in [(of_config, described), (of_layer, packed), (of_manifest, manifest)]:
            add(tar, blob(of), content)
    print(f"{','.join(names)} {of_manifest['digest']} {of_layer['size']} bytes compressed")


if __name__ == '__main__':
    main()
