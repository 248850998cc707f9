"""Helpers of the tests: tiny models, worker processes, numeric assertions. Nothing else imports this room."""
