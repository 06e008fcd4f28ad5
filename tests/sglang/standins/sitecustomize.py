"""Python imports this at start where the folder is on PYTHONPATH, so SGLang's child processes get it too.

torchvision's compiled part wants CUDA libraries. Without it the operators it registers do not exist and `import torchvision` fails,
although SGLang needs no more of it than an enum. So their names are defined (and nothing behind them) just before it is imported.
"""
import sys

OPS = """nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor
roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> (Tensor, Tensor)
ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio) -> (Tensor, Tensor)
ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> (Tensor, Tensor)
deform_conv2d(Tensor input) -> Tensor
_roi_align_backward(Tensor grad) -> Tensor
_roi_pool_backward(Tensor grad) -> Tensor
_ps_roi_align_backward(Tensor grad) -> Tensor
_ps_roi_pool_backward(Tensor grad) -> Tensor
_deform_conv2d_backward(Tensor grad) -> Tensor"""


class DefineFirst:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            self.lib = torch.library.Library("torchvision", "DEF")
            for schema in OPS.splitlines(): self.lib.define(schema)
            sys.torchvision_operators = self.lib      # a library that is collected takes its operators with it


sys.meta_path.insert(0, DefineFirst())
