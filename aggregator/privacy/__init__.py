"""What rounds cost in privacy, whether another one may start, and how much noise a budget needs."""

from aggregator.privacy.accountant import account
from aggregator.privacy.budget import Budget, BudgetExceeded, check_budget
from aggregator.privacy.references import gaussian_reference
from aggregator.privacy.solving import NoiseUnsolvable, solve_noise_multiplier
from protocol.dp.accounting import Spent

__all__ = [
    "Budget",
    "BudgetExceeded",
    "NoiseUnsolvable",
    "Spent",
    "account",
    "check_budget",
    "gaussian_reference",
    "solve_noise_multiplier",
]
