"""torchvision's models. The small ones have no stochastic depth: a dropped layer would get no gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import (
    convnext,
    detection,
    efficientnet,
    mobilenetv3,
    regnet,
    resnet,
    swin_transformer,
    vgg,
)

from sparsify.reporting.model_run import Inputs
from zoo_models.model import Model

#: Convolutions convert when asked for.
POINTWISE = {"types": [nn.Linear, nn.Conv2d]}


def _images(size: int, n: int = 2) -> Callable[[], Inputs]:
    return lambda: (torch.randn(n, 3, size, size),)


def _model(name: str, small: Callable[[], nn.Module], size: int, **options: Any) -> Model:
    return Model(small, _images(size), partial(_full, name), _images(224, 1), **options)


def _full(name: str) -> nn.Module:
    with torch.device("cpu"):  # a RegNet's constructor computes its widths with tensors
        return models.get_model(name, weights=None).to("meta")


def _vit() -> nn.Module:
    model = models.VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # it starts at zero: no output would say anything
    return model


def _swin(version: int) -> nn.Module:
    v2 = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    model: nn.Module = models.SwinTransformer(
        patch_size=[4, 4], embed_dim=32, depths=[2, 1], num_heads=[2, 4], window_size=[4, 4],
        stochastic_depth_prob=0.0, num_classes=10, **(v2 if version == 2 else {}),
    )  # fmt: skip
    return model


def _maxvit() -> nn.Module:
    model: nn.Module = models.MaxVit(
        (32, 32), stem_channels=16, partition_size=4, block_channels=[16, 32], block_layers=[1, 1], head_dim=8,
        stochastic_depth_prob=0.0, num_classes=10,
    )  # fmt: skip
    return model


def _convnext() -> nn.Module:
    blocks = [convnext.CNBlockConfig(32, 64, 1), convnext.CNBlockConfig(64, None, 2)]
    # layer_scale is 1e-6 otherwise, and would hide the blocks
    model: nn.Module = models.ConvNeXt(blocks, layer_scale=0.5, num_classes=10)
    return model


def _efficientnet() -> nn.Module:
    config = efficientnet.MBConvConfig
    blocks = [config(1, 3, 1, 32, 16, 1, 1.0, 1.0), config(6, 3, 2, 16, 24, 2, 1.0, 1.0)]
    model: nn.Module = models.EfficientNet(blocks, dropout=0.2, stochastic_depth_prob=0.0, num_classes=10)
    return model


def _mobilenet() -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig
    blocks = [config(16, 3, 16, 16, False, "RE", 1, 1, 1.0), config(16, 5, 64, 40, True, "HS", 2, 1, 1.0)]
    model: nn.Module = models.MobileNetV3(blocks, last_channel=128, num_classes=10)
    return model


def _regnet() -> nn.Module:
    blocks = regnet.BlockParams.from_init_params(depth=4, w_0=48, w_a=27.89, w_m=2.09, group_width=8, se_ratio=0.25)
    model: nn.Module = models.RegNet(blocks, num_classes=10)
    return model


def _classifier(model: Any, *layers: tuple[int, int, int]) -> nn.Module:
    """Put narrow Linears (index, in, out) into a classifier of a width fixed by its constructor."""
    for index, in_features, out_features in layers:
        model.classifier[index] = nn.Linear(in_features, out_features)
    assert isinstance(model, nn.Module)
    return model


def _vgg() -> nn.Module:
    with torch.device("meta"):  # 119 million parameters that are thrown away at once
        model = models.VGG(nn.Identity(), num_classes=10, init_weights=False)
    model.features = vgg.make_layers([8, "M", 16, "M"])
    return _classifier(model, (0, 16 * 7 * 7, 64), (3, 64, 64), (6, 64, 10))


def _alexnet() -> nn.Module:
    with torch.device("meta"):
        model = models.AlexNet(num_classes=10)
    model.features.to_empty(device="cpu")
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return _classifier(model, (1, 256 * 6 * 6, 64), (4, 64, 64), (6, 64, 10))


def _faster_rcnn() -> nn.Module:
    body = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])
    stages = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
    backbone = detection.backbone_utils.BackboneWithFPN(body, stages, [256, 512, 1024, 2048], 32)
    model: nn.Module = detection.FasterRCNN(
        backbone, min_size=64, max_size=64, box_detections_per_img=5, box_score_thresh=0.0,
        rpn_pre_nms_top_n_test=20, rpn_pre_nms_top_n_train=20,
        box_head=detection.faster_rcnn.TwoMLPHead(32 * 7 * 7, 64),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(64, 5),
    )  # fmt: skip
    return model


def _pictures() -> list[Tensor]:
    return [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]


def _boxes() -> list[dict[str, Tensor]]:
    return [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in range(2)]


MODELS = {
    "vit_b_16": _model("vit_b_16", _vit, 32),
    "swin_t": _model("swin_t", partial(_swin, 1), 32, bypasses_its_layers=True),
    "swin_v2_t": _model("swin_v2_t", partial(_swin, 2), 32, bypasses_its_layers=True),
    "maxvit_t": _model("maxvit_t", _maxvit, 32, convert=POINTWISE),
    "convnext_tiny": _model("convnext_tiny", _convnext, 32),
    "efficientnet_b0": _model("efficientnet_b0", _efficientnet, 32, convert=POINTWISE),
    "mobilenet_v3_large": _model("mobilenet_v3_large", _mobilenet, 32, convert=POINTWISE),
    "resnet50": _model(
        "resnet50", lambda: models.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10), 32, convert=POINTWISE
    ),
    "regnet_y_400mf": _model("regnet_y_400mf", _regnet, 32, convert=POINTWISE),
    "vgg11": _model("vgg11", _vgg, 32),
    "alexnet": _model("alexnet", _alexnet, 64),
    "fasterrcnn_resnet50_fpn": Model(
        small=_faster_rcnn,
        inputs=lambda: (_pictures(),),
        full=partial(models.get_model, "fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None),
        full_inputs=None,
        train_inputs=lambda: (_pictures(), _boxes()),
        convert=POINTWISE,
        continuous=False,
    ),
}
