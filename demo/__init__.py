"""The demo: a small model that knows things is taught a skill, with LoRA and with LoKI."""
