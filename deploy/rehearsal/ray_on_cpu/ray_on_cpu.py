"""vLLM's CPU platform for ranks on several nodes, which is all that its Ray mode lacks there.

vLLM refuses Ray on a CPU because the platform names no resource of Ray's for a rank to ask for: here a rank asks for
one "GPU", and each rehearsed node has one to give.
"""

from vllm.platforms.cpu import CpuPlatform


class CpuWithRay(CpuPlatform):
    """A CPU whose ranks Ray places like GPUs."""

    ray_device_key = "GPU"

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_id: str) -> int:
        """Ray numbers them; there is nothing behind the numbers."""
        return int(device_id)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """Where vLLM finds what ranks talk through."""
        return "network_communicator.NetworkCommunicator"


def platform() -> str:
    """Where vLLM finds the platform."""
    return "ray_on_cpu.CpuWithRay"
