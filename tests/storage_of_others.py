"""A connector that has the name of ours and is somebody else's: what is refused at start-up."""

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector as Theirs


class LogQuantStorageConnector(Theirs): ...
