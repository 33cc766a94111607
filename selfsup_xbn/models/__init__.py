"""Encoders: backbones, heads, split BatchNorm and pretrained weights."""
