"""A convolutional block for GPUs that takes the channels of all tasks in one call, and the ways to convolve them."""

from fewshot_asam.models.gpu_kernels.block import applies, conv2d, conv_block, runs_on
from fewshot_asam.models.gpu_kernels.convolution import Convolution
from fewshot_asam.models.gpu_kernels.settings import Kernels, current, use, using

__all__ = ["Convolution", "Kernels", "applies", "conv2d", "conv_block", "current", "runs_on", "use", "using"]
