"""Names of `prism_fast.models.token_budget` under which the trainers import them."""

from prism_fast.models.token_budget import StepTooLargeError as StepTooLargeError
from prism_fast.models.token_budget import TokenBudget as TokenBudget
from prism_fast.models.token_budget import by_tokens as by_tokens
from prism_fast.models.token_budget import out_of_memory as out_of_memory
