"""OpenVLA, OpenVLA-OFT and MiniVLA as the policy type "openvla" of LeRobot; importing this registers it."""

from .configuration_openvla import OpenVLAConfig

__all__ = ["OpenVLAConfig"]
