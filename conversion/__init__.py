"""Converters: dense checkpoints in, Mixture-of-Experts checkpoints out."""

from .upcycling import UpcyclingResult, upcycle, upcycle_model
from .verification import ExactnessReport, verify

__all__ = ["ExactnessReport", "UpcyclingResult", "upcycle", "upcycle_model", "verify"]
