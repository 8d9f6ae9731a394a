"""Losses: pure functions of scores. To add one, write the function, its setting in config/train.py, and a row here."""

from rayembed.losses.contrastive import info_nce
from rayembed.losses.distillation import kl_div, m3_kd_loss

KD_LOSSES = {"kl_div": kl_div, "m3_kd_loss": m3_kd_loss}

__all__ = ["KD_LOSSES", "info_nce", "kl_div", "m3_kd_loss"]
