"""A zoo of architectures: small versions with the structure that each family is known for.

`ZOO` says how each is made and what it takes; `cells` saves them in every format and compares.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from zoo import attention, convolutional, dense, recurrent


@dataclass(frozen=True)
class Given:
    """An input: the shape of a sample; whole numbers below `words`, where that is not 0."""

    shape: tuple[int, ...]
    words: int = 0


@dataclass(frozen=True)
class Arch:
    """An architecture: how to make it, and its inputs by name."""

    make: Callable[[], nn.Module]
    inputs: Mapping[str, Given]


IMAGE = {"x": Given((3, 16, 16))}
SEQUENCE = {"x": Given((6, 3))}
TOKENS = {"x": Given((6, 8))}
IDS = {"ids": Given((7,), words=11)}

ZOO: dict[str, Arch] = {
    "vgg": Arch(convolutional.Vgg, IMAGE),
    "resnet": Arch(convolutional.ResNet, IMAGE),
    "densenet": Arch(convolutional.DenseNet, IMAGE),
    "inception": Arch(convolutional.Inception, IMAGE),
    "mobilenet": Arch(lambda: convolutional.MobileNet(hard=True), IMAGE),
    "efficientnet": Arch(lambda: convolutional.MobileNet(hard=False), IMAGE),
    "shufflenet": Arch(convolutional.ShuffleNet, IMAGE),
    "convnext": Arch(convolutional.ConvNeXt, IMAGE),
    "big_transfer": Arch(convolutional.BigTransfer, IMAGE),
    "wavenet": Arch(convolutional.WaveNet, {"x": Given((2, 24))}),
    "unet": Arch(dense.UNet, {"x": Given((3, 13, 14))}),
    "deeplab": Arch(dense.DeepLab, {"x": Given((3, 15, 15))}),
    "super_resolution": Arch(dense.SuperResolution, {"x": Given((3, 7, 7))}),
    "siamese": Arch(dense.Siamese, {"left": Given((3, 16, 16)), "right": Given((3, 16, 16)), "facts": Given((2,))}),
    "spatial_transformer": Arch(dense.SpatialTransformer, IMAGE),
    "vit": Arch(lambda: attention.Vit(fused=False), IMAGE),
    "vit_fused": Arch(lambda: attention.Vit(fused=True), IMAGE),
    "swin": Arch(attention.Swin, IMAGE),
    "mixer": Arch(attention.Mixer, IMAGE),
    "encoder": Arch(lambda: attention.Encoder(norm_first=False), TOKENS),
    "encoder_norm_first": Arch(lambda: attention.Encoder(norm_first=True), TOKENS),
    "encoder_sequence_first": Arch(lambda: attention.Encoder(norm_first=False, batch_first=False), TOKENS),
    "translator": Arch(attention.Translator, {"source": Given((6, 8)), "target": Given((5, 8))}),
    "llama": Arch(attention.Llama, IDS),
    "bert": Arch(attention.Bert, IDS),
    "lstm": Arch(recurrent.LstmClassifier, SEQUENCE),
    "gru": Arch(lambda: recurrent.GruClassifier(batch_first=True), SEQUENCE),
    "gru_sequence_first": Arch(lambda: recurrent.GruClassifier(batch_first=False), SEQUENCE),
    "elman": Arch(recurrent.ElmanClassifier, SEQUENCE),
    "lstm_projected": Arch(recurrent.ProjectedLstm, SEQUENCE),
    "cell_loop": Arch(recurrent.CellLoop, SEQUENCE),
    "conv_gru": Arch(recurrent.ConvGru, {"x": Given((1, 8, 9))}),
    "mean_pool": Arch(recurrent.MeanPool, IDS),
    "text_cnn": Arch(recurrent.TextCnn, IDS),
    "bag": Arch(recurrent.Bag, IDS),
    "recommender": Arch(recurrent.Recommender, {"numbers": Given((5,)), "categories": Given((2,), words=4)}),
}

EXCEPTIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("bag", "onnx"): ("refused", "condition of an If depends on the input's data"),
    ("bag", "onnx_legacy"): ("refused", "trip count of a Loop depends on the batch size"),
    ("conv_gru", "onnx"): ("refused", "shape '.3, 16, 9.' is invalid"),  # the exporter wrote the example's batch down
    ("lstm_projected", "onnx"): ("refused", "LSTM"),  # the exporter leaves the projection out
    ("lstm_projected", "onnx_legacy"): ("not saved", "LSTMs with projections"),
    ("bert", "onnx_legacy"): ("not saved", "attn_mask"),
    ("llama", "onnx_legacy"): ("not saved", "rms_norm"),
    ("siamese", "onnx"): ("not saved", "Failed to convert"),
    ("spatial_transformer", "onnx_legacy"): ("not saved", "affine_grid_generator"),
    ("wavenet", "onnx_legacy"): ("not saved", "adaptive_avg_pool1d"),
}
"""Cells that are not ok: those that torch's own exporters cannot save, and those that hold what attrcli refuses."""
