"""The Python interface: functions for scripts and notebooks, and what they return."""
