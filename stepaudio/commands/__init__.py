"""The console commands: each module has `add_arguments` and `run_command`; `stepaudio.cli` finds them by name.

The scripts in scripts/ are some of them under the release's names.
"""
