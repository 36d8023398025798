"""A stand-in for SimplerEnv: its evaluator around a scene of a few lines. Copied by the tests to where they need it."""
