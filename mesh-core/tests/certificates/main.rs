//! When certificates are requested, renewed and given up, under a clock that the test turns.

mod rules;
mod simulation;
