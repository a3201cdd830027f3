"""What keeps knowledge? Small models of a generated world learn something new, in many ways."""
