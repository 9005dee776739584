"""CT by rules: body, lungs, airways, bone, fat, muscle and gas. See docs/ct-tissues.md."""
