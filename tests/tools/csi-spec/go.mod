// The specification of CSI, for tests/tests/csi_proto.rs: newer than csi-sanity can be built with.
module sheave.dev/tests/tools/csi-spec

go 1.25.0

tool github.com/container-storage-interface/spec/lib/go/csi

require github.com/container-storage-interface/spec v1.13.0 // indirect
