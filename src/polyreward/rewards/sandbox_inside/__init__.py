"""What runs inside a worker of the sandbox: a warm fork server, and the processes which it forks.

These modules use nothing but the standard library and import nothing of polyreward: a worker sees this folder, the
Python installation, and nothing else.
"""
