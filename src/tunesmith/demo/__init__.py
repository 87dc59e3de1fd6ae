"""What the bundled base shows in a minute: fine-tuning on a task, and learning from preferences, rewards and steps."""

from tunesmith.demo.alignment import align, print_align
from tunesmith.demo.quickstart import demo, print_demo

__all__ = ["align", "demo", "print_align", "print_demo"]
