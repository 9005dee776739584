"""What can be done to a label map, and what can be read off one."""
