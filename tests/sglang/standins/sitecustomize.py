"""Python imports this at start where the folder is on PYTHONPATH: SGLang's children get it too.

torchvision's compiled part wants CUDA libraries. Without it the operators it registers do not
exist and `import torchvision` fails, although SGLang needs no more of it than an enum. So their
names are defined (and nothing behind them) just before it is imported.
"""

import sys

POOLED = "SymInt pooled_height, SymInt pooled_width"
OPERATORS = [
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, Tensor rois, float spatial_scale, {POOLED}, int sampling_ratio, "
    "bool aligned) -> Tensor",
    f"roi_pool(Tensor input, Tensor rois, float spatial_scale, {POOLED}) -> (Tensor, Tensor)",
    f"ps_roi_align(Tensor input, Tensor rois, float spatial_scale, {POOLED}, int sampling_ratio) "
    "-> (Tensor, Tensor)",
    f"ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, {POOLED}) -> (Tensor, Tensor)",
    "deform_conv2d(Tensor input) -> Tensor",
    "_roi_align_backward(Tensor grad) -> Tensor",
    "_roi_pool_backward(Tensor grad) -> Tensor",
    "_ps_roi_align_backward(Tensor grad) -> Tensor",
    "_ps_roi_pool_backward(Tensor grad) -> Tensor",
    "_deform_conv2d_backward(Tensor grad) -> Tensor",
]


class DefineFirst:
    "Defines the operators when somebody looks for torchvision, once."

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for schema in OPERATORS:
                library.define(schema)
            # a library that is collected takes its operators with it
            sys.torchvision_operators = library


sys.meta_path.insert(0, DefineFirst())
