"""TLS 1.2 and 1.3 are spoken, older ones are not.

usage: tls_versions.py PORT CERTIFICATES
"""

import ssl
import sys
import warnings

from nbd_over_tls import READ, context, go, receive, request, simple_reply, starttls

port, directory = int(sys.argv[1]), sys.argv[2]
warnings.simplefilter("ignore", DeprecationWarning)


def connect(version):
    tls = context(directory)
    # OpenSSL refuses old versions by itself at its usual level.
    tls.set_ciphers("ALL:@SECLEVEL=0")
    tls.minimum_version = tls.maximum_version = version
    return tls.wrap_socket(starttls(port), server_hostname="localhost")


for version, name in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
    stream = connect(version)
    assert stream.version() == name, stream.version()
    go(stream)
    stream.sendall(request(READ, 1, 0, 4096))
    assert simple_reply(stream) == (0, 1)
    assert receive(stream, 4096) == bytes(4096)
    stream.close()

for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
    try:
        connect(version)
    except (ssl.SSLError, ConnectionError):
        continue
    raise AssertionError(version)
