"""The stitching protocol: which models stitch, at what depth, by what training, on what task, against what control."""

from vst.protocol.config import ProtocolConfig, TaskConfig, TrainConfig
from vst.protocol.grid import run_protocol

__all__ = ["ProtocolConfig", "TaskConfig", "TrainConfig", "run_protocol"]
