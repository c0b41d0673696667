"""vLLM's CPU ranks talk through shared memory, also where they have none in common: here they use the network."""

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class NetworkCommunicator(CpuCommunicator):
    """Gloo, always."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False
