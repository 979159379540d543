"""Random problems that hold the library against the specification as plain loops.

``python -m tests.random_problems --help`` says how to run many of them.
"""
