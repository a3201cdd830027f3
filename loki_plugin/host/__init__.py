"""What knows Axolotl: settings, the life of one run, and what is changed in Axolotl itself."""
