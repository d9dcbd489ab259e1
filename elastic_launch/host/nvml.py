"""Ask NVML for the NVIDIA GPUs of this host, through the module ``pynvml`` (``elastic-launch[nvml]``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class NvmlError(Exception):
    """NVML is not available, or cannot answer. The message says why."""


class Gpu(NamedTuple):
    """An NVIDIA GPU."""

    uuid: str
    """For example ``GPU-5c89c4e2-...``."""
    pci_address: str
    """As in /sys: ``0000:19:00.0``."""
    has_mig: bool = False
    """Whether it is divided into MIG devices."""


def query(mig_devices: Sequence[str] = ()) -> tuple[list[Gpu], list[str]]:
    """Ask NVML for this host's GPUs.

    Args:
        mig_devices: UUIDs of MIG devices.

    Returns:
        All GPUs, in the order of their PCI addresses, and the PCI addresses of the GPUs that contain ``mig_devices``.

    Raises:
        NvmlError: pynvml is not installed, NVML does not work, or it does not know one of the MIG devices.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NvmlError(error) from error

    def address_of(handle: object) -> str:
        pci = pynvml.nvmlDeviceGetPciInfo(handle)
        return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"

    def has_mig(handle: object) -> bool:
        try:
            return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
        except pynvml.NVMLError:  # a model without MIG
            return False

    def gpu_of(handle: object) -> Gpu:
        uuid = pynvml.nvmlDeviceGetUUID(handle)  # bytes in old releases of pynvml
        return Gpu(uuid.decode() if isinstance(uuid, bytes) else uuid, address_of(handle), has_mig(handle))

    try:
        pynvml.nvmlInit()
        try:
            gpus = [gpu_of(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
            parts = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in mig_devices]
            return gpus, [address_of(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)) for part in parts]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise NvmlError(error) from error
