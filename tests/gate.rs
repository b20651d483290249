pub fn trials() -> Vec<crate::Test> {
    vec![]
}
