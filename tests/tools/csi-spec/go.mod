// The specification of CSI, for tests/tests/csi_proto.rs: with the volume condition, which the version
// that csi-sanity is built with has not any more.
module sheave.dev/tests/tools/csi-spec

go 1.25.0

tool github.com/container-storage-interface/spec/lib/go/csi

require (
	github.com/container-storage-interface/spec v1.12.0 // indirect
	github.com/golang/protobuf v1.5.4 // indirect
	golang.org/x/net v0.38.0 // indirect
	golang.org/x/sys v0.31.0 // indirect
	golang.org/x/text v0.23.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20230803162519-f966b187b2e5 // indirect
	google.golang.org/grpc v1.57.1 // indirect
	google.golang.org/protobuf v1.33.0 // indirect
)
