"""The commands of `loki`, a module each; `loki_plugin.cli` lists them."""
