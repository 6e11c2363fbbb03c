"""What a run reveals: the mechanism, its epsilon, and the noise an epsilon needs.

This room imports no torch: epsilon can be had, and checked, without training.
"""

from dpsgd.privacy.accountant import Accountant
from dpsgd.privacy.audit import AuditResult, CanaryResult, check_confidence, examine
from dpsgd.privacy.calibration import calibrate_noise_multiplier, calibrate_num_steps
from dpsgd.privacy.estimator import estimate_delta, estimate_epsilon
from dpsgd.privacy.ledger import PrivacyLedger
from dpsgd.privacy.mechanism import DPSGDMechanism, EpsilonBound, Phase, rounded_up
from dpsgd.privacy.pld import PLDAccountant
from dpsgd.privacy.prv import PRVAccountant
from dpsgd.privacy.rdp import RDPAccountant
from dpsgd.privacy.registry import ACCOUNTANTS, build_accountant
from dpsgd.privacy.trials import Trials

__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "AuditResult",
    "CanaryResult",
    "DPSGDMechanism",
    "EpsilonBound",
    "PLDAccountant",
    "PRVAccountant",
    "Phase",
    "PrivacyLedger",
    "RDPAccountant",
    "Trials",
    "build_accountant",
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "check_confidence",
    "estimate_delta",
    "estimate_epsilon",
    "examine",
    "rounded_up",
]
