// A message's text as DOM nodes: fenced code apart, everything else as it is. Never as HTML.

export function render(target, text) {
  const parts = text.split(/^```[\w+#.-]*[ \t]*(?:\n|$)/m);
  target.replaceChildren(
    ...parts.flatMap((part, index) => {
      if (index % 2 === 0) return part ? [document.createTextNode(part)] : [];
      const pre = document.createElement("pre");
      pre.tabIndex = 0;
      pre.textContent = part.replace(/\n$/, "");
      return [pre];
    }),
  );
}
