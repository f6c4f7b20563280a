//! Which epoch has which log objects.
