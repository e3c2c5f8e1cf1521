//! Sizes of files and functions: over budget is reported, over the cap is a finding.

use super::rust::Source;

/// Lines of a file without its tests.
const FILE_BUDGET: usize = 500;
const FILE_CAP: usize = 800;
/// Lines of a function: a screen.
const FUNCTION_BUDGET: usize = 70;
const FUNCTION_CAP: usize = 150;

/// What is large in one file.
#[derive(Default)]
pub(super) struct Sizes {
    pub(super) over_budget: Vec<String>,
    pub(super) over_caps: Vec<String>,
}

pub(super) fn measure(file: &str, source: &Source) -> Sizes {
    let mut sizes = Sizes::default();
    let mut judge = |lines: usize, budget: usize, cap: usize, what: String| {
        if lines > cap {
            sizes.over_caps.push(format!("{what} has {lines} lines, more than {cap}: split it"));
        } else if lines > budget {
            sizes.over_budget.push(format!("{what}: {lines} lines (budget {budget})"));
        }
    };
    judge(source.lines_without_tests, FILE_BUDGET, FILE_CAP, file.to_owned());
    for function in source.functions() {
        let what = format!("{file}:{} fn {}", function.first_line, function.name);
        judge(function.lines, FUNCTION_BUDGET, FUNCTION_CAP, what);
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_function_is_reported_and_a_huge_one_is_a_finding() {
        let function = |lines: usize| format!("fn f() {{\n{}}}\n", "  x();\n".repeat(lines - 2));
        let of = |lines: usize| measure("a.rs", &Source::read(&function(lines)));
        assert!(of(FUNCTION_BUDGET).over_budget.is_empty());
        assert_eq!(of(FUNCTION_BUDGET + 1).over_budget.len(), 1);
        assert_eq!(of(FUNCTION_CAP + 1).over_caps.len(), 1);
    }
}
