"""What GPUs can do at most, from the makers' data sheets.

- A100: nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/
  nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
- H100: nvidia.com/en-us/data-center/h100
- H200: nvidia.com/en-us/data-center/h200
"""

from dataclasses import dataclass

# Dense bf16 products per second in TFLOP/s.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "H800": 989.0,
}


@dataclass(frozen=True)
class GPU:
    """The limits of a GPU.

    Attributes:
        name: the GPU, with its memory or board where there are several.
        bandwidth: bytes per second that the memory reads and writes.
        bf16: operations per second of products in bf16, on tensor cores.
        fp32: operations per second in fp32, on ordinary cores. Torch's products in fp32 run there
            unless TF32 is allowed.
    """

    name: str
    bandwidth: float
    bf16: float
    fp32: float


A100 = GPU("A100 80GB SXM", 2.039e12, PEAK_TFLOPS["A100"] * 1e12, 19.5e12)
H100 = GPU("H100 SXM", 3.35e12, PEAK_TFLOPS["H100"] * 1e12, 67e12)
H200 = GPU("H200 SXM", 4.8e12, PEAK_TFLOPS["H200"] * 1e12, 67e12)
GPUS = (A100, H100, H200)
