"""EfficientNet-Lite without its classifier: pixels `[N, 3, S, S]` -> features `[N, grid * grid,
D]`.

Batch normalization is folded into the convolutions. Source: Tan and Le 2019 (arXiv 1905.11946);
its Lite form has ReLU6 and no squeeze-and-excitation.
"""

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad, relu6

from ..config import STEM, EfficientNetConfig, InvertedBottleneck


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME": the output has 1 / stride of the input's
    sides, rounded up, and an odd padding is larger at the right and below."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in x.shape[2:])
        x = pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return conv2d(x, self.weight.to(x.dtype), bias, stride, groups=self.groups)


class Block(nn.Module):
    def __init__(self, c: InvertedBottleneck) -> None:
        super().__init__()
        inner = c.inputs * c.expansion
        self.expand = Conv(c.inputs, inner) if c.expansion > 1 else None
        self.depthwise = Conv(inner, inner, c.kernel, c.stride, groups=inner)
        self.project = Conv(inner, c.outputs)
        self.residual = c.stride == 1 and c.inputs == c.outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.expand is None else relu6(self.expand(x))
        out = self.project(relu6(self.depthwise(inner)))
        return x + out if self.residual else out


class EfficientNet(nn.Module):
    """Computes in float32: it has a thousandth of so400m's operations, and a CPU without bfloat16
    products would take far longer in that type."""

    def __init__(self, c: EfficientNetConfig) -> None:
        super().__init__()
        self.pool_size, self.pool_stride = c.pool_size, c.pool_stride
        self.stem = Conv(3, STEM, 3, 2)
        self.blocks = nn.ModuleList(Block(block) for block in c.blocks)
        self.head = Conv(c.blocks[-1].outputs, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        x = relu6(self.stem(pixels.float()))
        for block in self.blocks:
            x = block(x)
        x = avg_pool2d(relu6(self.head(x)), self.pool_size, self.pool_stride)
        return x.flatten(2).transpose(1, 2).to(pixels.dtype)
