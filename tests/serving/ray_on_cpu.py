"""A plug-in for vLLM, by which its workers on a CPU may be run by Ray; `test_ray` copies it to where vLLM finds it.

vLLM's own CPU platform has no name for what Ray counts, and is refused. Here every CPU worker counts as one of the GPUs
that Ray was told of: they are numbers to it.
"""

from vllm.platforms.cpu import CpuPlatform


class RayOnCpu(CpuPlatform):
    """vLLM's CPU platform, on several machines."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """The CPU's, without the shared memory in which it takes all workers to meet."""
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

        CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
        return super().get_device_communicator_cls()


def platform() -> str:
    """What vLLM is to take in the place of its own."""
    return "ray_on_cpu.RayOnCpu"
